"""What a training loop talks to: RTRL, Carry and BlockRTRL, and the engines behind them."""
