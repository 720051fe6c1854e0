"""One look at what a method keeps of images and answers: pictures, and a page that needs nothing else."""
