"""What one image costs, in multiply-accumulates, part by part and beside the paper's figures."""
