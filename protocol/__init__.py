"""What two machines must agree on, without I/O: no sockets, no torch, no files."""
