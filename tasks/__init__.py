"""seqio tasks and mixtures, one file a data set; importing a module registers its tasks."""
