"""What RewardModelJob and PolicyOptimizationJob share: the life of a training job."""
