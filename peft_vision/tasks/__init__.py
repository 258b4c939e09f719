"""What is learned: one file, or folder, per task."""
