"""What the tests share: golden cases, tiny models, ranks, commands, faults and a Slurm."""
