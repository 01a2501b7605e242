"""What can be measured from rows and activations: sums, curves, intervals, probes. No results, no terminal."""
