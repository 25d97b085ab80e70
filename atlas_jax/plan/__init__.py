"""`atlas plan`: the programs of a run, compiled for a machine that need not be here."""
