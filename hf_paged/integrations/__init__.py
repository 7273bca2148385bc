"""What other libraries add to a model. `peft` is the only one: importing this package imports none of them."""
