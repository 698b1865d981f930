"""World models trained from embedding stores, and the probes of them."""
