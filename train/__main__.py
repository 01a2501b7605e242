"""`python -m train`, which launchers such as torchrun need."""

from matryoshka.launch import train

if __name__ == "__main__":
    train()
