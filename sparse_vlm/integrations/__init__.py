"""Plug-ins: what a host program needs to take the tower as one of its own. One module a host, imported only by who uses that host."""
