"""`python -m dynamic_llava.train.launch`: starts as many training processes as the machine and the run call for."""
