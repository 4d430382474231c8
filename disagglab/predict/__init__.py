"""What should come out, before anything runs: break-even, goodput, hit rates, reads in pieces."""
