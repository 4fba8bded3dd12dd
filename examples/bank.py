"""Transfer money between accounts in shared memory, while the workers that do it are killed.

    python examples/bank.py [--workers N] [--kills N] [--start-method {fork,forkserver,spawn}]

A transfer takes a RangeLock on each of its two accounts, so that transfers between others go on at the same
time; always on the lower account first, since two workers that each wait for the other's account would wait
for ever. The kernel releases the locks of a worker that is killed. But what it was doing is then half done:
money has left one account and has not come to the other.

So each worker has a journal in shared memory, under a RobustLock. Before it changes anything it writes down
what there was, and marks both accounts with its number. Whoever comes upon a marked account, which nobody has
locked, takes the lock of that journal, is told that its owner died, and puts back what there was.
"""

import argparse
import os
import random
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import mpmemory as mp

ACCOUNTS = 20
MONEY = 1000  # on each account, at first

ACCOUNT_SIZE = 16  # the money, and the worker that is changing it: its number from 1 on, or 0
JOURNAL_SIZE = 40  # whether a transfer is going on; payer, and what it had; payee, and what it had
TRANSFERS, REPAIRS, STOP = range(3)  # numbers that all can see


@dataclass
class Bank:
    """What all workers share. All of it is sent to them by reference."""

    workers: int
    accounts: mp.SharedBuffer = field(init=False)
    journals: mp.SharedBuffer = field(init=False)
    locks: list[mp.RobustLock] = field(init=False)  # of the journals
    numbers: mp.SharedBuffer = field(init=False)

    def __post_init__(self) -> None:
        self.accounts = mp.SharedBuffer(ACCOUNTS * ACCOUNT_SIZE, name="accounts")
        self.journals = mp.SharedBuffer(self.workers * JOURNAL_SIZE, name="journals")
        self.locks = [mp.RobustLock() for _ in range(self.workers)]
        self.numbers = mp.SharedBuffer(3 * 8, name="numbers")
        numbers = self.accounts.view("q")
        for account in range(ACCOUNTS):
            numbers[2 * account] = MONEY

    def money(self) -> int:
        return sum(self.accounts.view("q")[::2])

    def count(self, what: int) -> None:
        with self.numbers.lock(8 * what, 8):
            self.numbers.view("q")[what] += 1


def lock_both(bank: Bank, one: int, other: int) -> list[Any]:
    return [bank.accounts.lock(ACCOUNT_SIZE * account, ACCOUNT_SIZE) for account in sorted((one, other))]


def transfer(bank: Bank, worker: int, payer: int, payee: int, amount: int) -> None:
    """Transfer money, if there is as much."""
    while broken := try_to_transfer(bank, worker, payer, payee, amount):
        with bank.locks[broken - 1] as lock:
            if lock.owner_died:
                repair(bank, broken)


def try_to_transfer(bank: Bank, worker: int, payer: int, payee: int, amount: int) -> int:
    """Do it, and return 0; or the number of a worker that died while it changed one of the accounts."""
    accounts = bank.accounts.view("q")
    journal = bank.journals.view("q", 5, (worker - 1) * JOURNAL_SIZE)
    first, second = lock_both(bank, payer, payee)
    with bank.locks[worker - 1] as lock:
        if lock.owner_died:  # the worker of this number before us
            repair(bank, worker)
        with first, second:
            for account in (payer, payee):
                if accounts[2 * account + 1]:
                    return int(accounts[2 * account + 1])
            if accounts[2 * payer] < amount:
                return 0
            # Each step is one number, and leaves something that `repair` knows what to do with.
            journal[1], journal[2], journal[3], journal[4] = payer, accounts[2 * payer], payee, accounts[2 * payee]
            journal[0] = 1
            accounts[2 * payer + 1] = accounts[2 * payee + 1] = worker
            accounts[2 * payer] -= amount
            os.sched_yield()  # this is where many will be killed
            accounts[2 * payee] += amount
            journal[0] = 0
            accounts[2 * payer + 1] = accounts[2 * payee + 1] = 0
    bank.count(TRANSFERS)
    return 0


def repair(bank: Bank, worker: int) -> None:
    """Undo the transfer that a worker died in. Its journal is locked; if we die here, the next one does it."""
    accounts = bank.accounts.view("q")
    journal = bank.journals.view("q", 5, (worker - 1) * JOURNAL_SIZE)
    going_on, payer, money_of_payer, payee, money_of_payee = journal.tolist()
    if payer == payee:  # it has never transferred anything
        return
    first, second = lock_both(bank, payer, payee)
    with first, second:
        marked = [account for account in (payer, payee) if accounts[2 * account + 1] == worker]
        for account in marked if going_on else []:
            accounts[2 * account] = money_of_payer if account == payer else money_of_payee
        journal[0] = 0
        for account in marked:
            accounts[2 * account + 1] = 0
    if going_on and marked:
        bank.count(REPAIRS)


def work(bank: Bank, worker: int, seed: int) -> None:
    choose = random.Random(seed)
    numbers = bank.numbers.view("q")
    while not numbers[STOP]:
        payer, payee = choose.sample(range(ACCOUNTS), 2)
        transfer(bank, worker, payer, payee, choose.randint(1, 100))


def main() -> None:
    parser = argparse.ArgumentParser(description="Transfer money in shared memory while workers are killed.")
    parser.add_argument("--workers", type=int, default=4, choices=range(1, 33), metavar="N")
    parser.add_argument("--kills", type=int, default=40, choices=range(1001), metavar="N")
    parser.add_argument("--start-method", choices=mp.get_all_start_methods(), default=mp.get_start_method())
    args = parser.parse_args()
    ctx = mp.get_context(args.start_method)

    bank = Bank(args.workers)
    numbers = bank.numbers.view("q")
    print(f"{ACCOUNTS} accounts, {MONEY} on each. Workers: {args.workers}. One of them is killed, {args.kills} times.")

    seeds = iter(range(10_000))

    def start(worker: int) -> BaseProcess:
        process: BaseProcess = ctx.Process(target=work, args=(bank, worker, next(seeds)), daemon=True)
        process.start()
        return process

    processes = {worker: start(worker) for worker in range(1, args.workers + 1)}
    for _ in range(args.kills):
        # Wait until something was transferred since the last one, and then some moments.
        seen = numbers[TRANSFERS]
        while numbers[TRANSFERS] == seen:
            time.sleep(0.0005)
        time.sleep(random.random() / 200)
        worker = random.choice(list(processes))
        processes[worker].kill()
        processes[worker].join()
        processes[worker] = start(worker)
    numbers[STOP] = 1
    for process in processes.values():
        process.join()

    # Of those who were killed last, nobody may have come upon an account yet.
    for worker, lock in enumerate(bank.locks, 1):
        with lock:
            if lock.owner_died:
                repair(bank, worker)
    print(f"{numbers[TRANSFERS]} transfers, and {numbers[REPAIRS]} that were half done and have been undone.")
    if bank.money() != ACCOUNTS * MONEY or any(bank.accounts.view("q")[1::2]):
        raise SystemExit(f"expected {ACCOUNTS * MONEY} and no marks, found {bank.accounts.view('q').tolist()}")
    print(f"OK: there are still {bank.money()}.")


if __name__ == "__main__":
    main()
