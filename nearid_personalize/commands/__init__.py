"""What each `nearid` command does: a module a command, imported when it runs; its options are in `options`."""
