"""`atlas plan`: compiles the programs of a run for a machine that need not be present."""
