"""How a decoder is cut over ranks: what each holds, when it computes, what it exchanges."""
