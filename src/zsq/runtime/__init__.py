"""What happens to an exported file: it is verified, benchmarked, and its images feed other quantizers."""
