"""What is computed: one model at a time, plain classes, no Ray."""
