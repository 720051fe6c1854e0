"""What training and inference cost: calculated and measured numbers, as tables and JSON lines."""
