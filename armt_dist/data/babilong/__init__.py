"""BABILong: facts of bAbI stories hidden in long text."""
