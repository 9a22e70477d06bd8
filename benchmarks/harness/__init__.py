"""What benchmarks stand on: not benchmarks themselves."""
