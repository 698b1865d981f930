"""What the command line does beyond calling one stage: print, check the machine, go the whole way."""
