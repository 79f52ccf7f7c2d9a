"""Videos of scikit-learn's digits that fly over a black canvas and bounce off its walls, made on the fly."""

import torch
from torch.nn import functional as F

from scripts.train.digits_data import SOURCE_SIZE, jitter, real_digits

# Side of the flying 8x8 picture as a share of the canvas.
DIGIT_SHARE = 0.5
# Speed in canvas sides per frame, slowest and fastest: 0.6 and 1.8 pixels at 32 px.
SPEEDS = (0.6 / 32, 1.8 / 32)


def bounce(start: torch.Tensor, speed: torch.Tensor, frames: int) -> torch.Tensor:
    """Positions of a point between two walls at 0 and 1.

    Args:
        start: First position on each axis [..., 2], 0 to 1.
        speed: Way per frame on each axis [..., 2].
        frames: Number of frames T.

    Returns:
        [..., T, 2], 0 to 1: straight ways, reflected at the walls.
    """
    time = torch.arange(frames, device=start.device, dtype=start.dtype)[:, None]
    way = (start[..., None, :] + speed[..., None, :] * time) % 2
    return torch.where(way > 1, 2 - way, way)


def render(images: torch.Tensor, centers: torch.Tensor, size: int, theta: torch.Tensor) -> torch.Tensor:
    """Draws each digit at its centers in one bicubic resampling.

    Args:
        images: Digits [B, 1, 8, 8], values 0 to 1.
        centers: [B, T, 2], x and y from -1 to 1 (canvas borders).
        size: Side of the canvas in pixels.
        theta: Rotation and scale of each digit [B, 2, 3], as `digits_data.jitter` makes them.

    Returns:
        [B, 1, T, size, size] with values -1 to 1.
    """
    batch, frames = centers.shape[:2]
    maps = theta[:, None].repeat(1, frames, 1, 1)
    maps[..., :2] /= DIGIT_SHARE
    maps[..., 2:] -= maps[..., :2] @ centers[..., None]
    grid = F.affine_grid(maps.flatten(0, 1), [batch * frames, 1, size, size], align_corners=False)
    pictures = images.repeat_interleave(frames, 0)
    drawn = F.grid_sample(pictures, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return drawn.clamp(0, 1).unflatten(0, (batch, frames)).transpose(1, 2) * 2 - 1


def fly(batch: int, frames: int, generator: torch.Generator) -> torch.Tensor:
    """Random ways of the centers [batch, frames, 2], x and y from -1 to 1, on which a digit stays on the canvas."""
    room = 1 - DIGIT_SHARE
    start, (angle, pace) = torch.rand(batch, 2, generator=generator), torch.rand(2, batch, generator=generator)
    slow, fast = SPEEDS
    way = (slow + (fast - slow) * pace) / room
    turn = 2 * torch.pi * angle
    return (bounce(start, torch.stack([turn.cos(), turn.sin()], -1) * way[:, None], frames) * 2 - 1) * room


class MovingDigits:
    """Draws training batches; a batch depends only on the generator it is given.

    Args:
        device: Where the batches are made and go.
        augment: Strength of `digits_data.jitter`, 0 for none.
        digits: Images [N, 1, 8, 8] and labels [N] to draw from; all real digits by default.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        augment: float = 1.0,
        digits: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        images, labels = real_digits() if digits is None else digits
        self.images, self.labels = images.to(device), labels.to(device)
        self.augment = augment

    def draw(self, batch: int, frames: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Videos [batch, 1, frames, size, size] with values -1 to 1 and labels [batch]; generator is on the CPU."""
        device = self.images.device
        index = torch.randint(len(self.labels), (batch,), generator=generator).to(device)
        theta, centers = jitter(batch, self.augment, generator).to(device), fly(batch, frames, generator).to(device)
        return render(self.images[index], centers, size, theta), self.labels[index]


def centers_of(videos: torch.Tensor) -> torch.Tensor:
    """Centers of the ink [B, T, 2], x and y from -1 to 1, of videos [B, 1, T, H, W] with values 0 to 1."""
    ink = videos[:, 0] - 0.1
    ink = ink.clamp_min(0)
    total = ink.sum((-1, -2)).clamp_min(1e-6)
    found = []
    for axis in (-1, -2):
        length = ink.shape[axis]
        place = (torch.arange(length, device=ink.device) + 0.5) * 2 / length - 1
        found.append((ink.sum(-2 if axis == -1 else -1) * place).sum(-1) / total)
    return torch.stack(found, -1)


def cut_out(videos: torch.Tensor) -> torch.Tensor:
    """The digit of every frame, cut out around its center of ink: [B, T, 64], 8x8 pixels with values 0 to 1."""
    batch, _, frames, height, _ = videos.shape
    centers = centers_of(videos).flatten(0, 1)
    maps = torch.zeros(batch * frames, 2, 3, device=videos.device)
    maps[:, 0, 0] = maps[:, 1, 1] = DIGIT_SHARE
    maps[:, :, 2] = centers
    side = round(height * DIGIT_SHARE)
    grid = F.affine_grid(maps, [batch * frames, 1, side, side], align_corners=False)
    flat = videos.transpose(1, 2).flatten(0, 1)
    cut = F.grid_sample(flat, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.interpolate(cut, (SOURCE_SIZE, SOURCE_SIZE), mode="area").flatten(1).unflatten(0, (batch, frames))
