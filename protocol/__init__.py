"""What two machines must agree on: no sockets, no torch. Only ``command`` reads files."""
