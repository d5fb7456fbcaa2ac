"""Train the network of ``benchmarks.digits``: ``python -m benchmarks.train_digits``.

On two cores it takes some minutes, and writes ``benchmarks/digits.pt``.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from benchmarks.digits import CHECKPOINT, DigitNet, accuracy, clips

BATCH, CHUNK, RATE = 64, 50, 3e-3


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.train_digits", description=__doc__)
    parser.add_argument("--steps", type=int, default=1200, help="of 64 clips each")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    net = DigitNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(steps):
        if step % CHUNK == 0:
            x, labels = clips(CHUNK * BATCH, seed=100 + step)
        at = slice(step % CHUNK * BATCH, (step % CHUNK + 1) * BATCH)
        loss = F.cross_entropy(net(x[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    net.eval()
    test, labels = clips(3000, seed=1, held_out=True)
    print(f"accuracy on held-out digits: {100 * accuracy(net, test, labels):.2f} %")
    torch.save(net.state_dict(), CHECKPOINT)


if __name__ == "__main__":
    main()
