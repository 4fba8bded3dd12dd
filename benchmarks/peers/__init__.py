"""What we are measured against: each peer behind the one interface of its kind, imported only when it is started."""
