"""What every program does on its machine: tell its operator what happens."""
