"""The cost of compiled programs: FLOPs, memory and communication."""
