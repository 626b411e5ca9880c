"""Parameters, FLOPs, memory and time of a plan, estimated or measured."""
