"""What a run will need, told before anything is allocated: parameters, bytes, the compiled step's memory and FLOPs."""
