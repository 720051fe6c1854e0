"""What other programs ask of this package: the model plug-in of lmms-eval."""
