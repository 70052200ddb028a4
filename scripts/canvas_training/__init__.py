"""How the canvas, its judges and its retrained control are made from npm icon sets; run by scripts/train_canvas.py."""
