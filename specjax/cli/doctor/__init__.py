"""`specjax doctor`: what this machine has, what is wrong with it, and whether speculation is exact and pays here."""
