"""From an example to text: the prompt styles, and the checkpoint's chat template in a process of its own."""
