"""Hangs, with a child that hangs; or leaves that behind: what the programs of this folder are watched for."""

from __future__ import annotations

import os
import signal
import sys

from supervise import report, show_stacks_when_asked


def wait_for_ever() -> None:
    signal.pause()


show_stacks_when_asked()
if os.fork() == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    wait_for_ever()
report(begin="to hang")
if sys.argv[1:] != ["orphan"]:
    wait_for_ever()
