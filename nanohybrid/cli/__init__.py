"""The command line: one thin module a command. Parse, call the room that knows, print."""
