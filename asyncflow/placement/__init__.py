"""Where services run: pools of devices and the turns that colocated services take on them."""
