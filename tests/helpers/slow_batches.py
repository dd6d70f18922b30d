"""A slow, plain reference of ``set_batch_sequence_length``: Python loops over single elements, from its documentation.

Shapes: B rows, S full length, s the step's length, K segments per row.
"""

import itertools

import torch

PER_TOKEN = ["input_ids", "labels", "shift_labels", "attention_mask", "position_ids", "token_type_ids", "loss_mask"]
PER_TOKEN += ["inputs_embeds"]
CUMULATIVE = ["cu_seq_lens_q", "cu_seq_lens_k"]


class NoRowsError(Exception):
    """The batch has no rows. Any shapes are right."""


class RefusedError(Exception):
    """The batch or an argument must be refused."""


def shorten(tensors, s, truncate, keep_end, labels_shifted, padding_free):
    """Return the new values by name and the number of targets. ``tensors`` has numbers too (``max_length_q``)."""
    for name in (*PER_TOKEN, *CUMULATIVE, "seq_idx"):
        if not isinstance(tensors.get(name), (torch.Tensor, dict, type(None))):
            raise RefusedError
    main = _tokens(tensors)
    new = dict(tensors)
    if tensors[main].ndim == 2 and not len(tensors[main]):
        raise NoRowsError
    if s < tensors[main].shape[-1]:
        positions = _documents(tensors, main, truncate, padding_free)
        if positions is None:
            new = _cut_rows(tensors, main, s, truncate, keep_end)
        else:
            new = _cut_documents(tensors, main, positions, s)
    return new, _targets(new, main, labels_shifted)


def is_tensor(value, ndim):
    return isinstance(value, torch.Tensor) and value.ndim == ndim


def _tokens(tensors):
    for name in ("input_ids", "tokens", "labels", *tensors):
        if is_tensor(tensors.get(name), 2):
            return name
    for name in tensors:
        if name in ("position_ids", "positions") and is_tensor(tensors[name], 1) and _whole(tensors[name]):
            return name
    raise RefusedError


def _whole(tensor):
    return tensor.dtype in (torch.int16, torch.int32, torch.int64)


def _targets(new, main, labels_shifted):
    names = [name for name in ("shift_labels", "labels") if is_tensor(new.get(name), new[main].ndim)]
    if not names and list(new) == [0, 1] and is_tensor(new[1], 2) and new[1].shape == new[main].shape:
        names = [1]
    first = 0 if labels_shifted or "shift_labels" in names else 1
    counted = 0
    for row in torch.atleast_2d(new[names[0]] if names else new[main]).tolist():
        counted += sum(1 for label in row[first:] if not names or label != -100)
    return counted


# Rows of one document.


def _cut_rows(tensors, main, s, truncate, keep_end):
    rows, full = tensors[main].shape
    kept, window = _columns(tensors, rows, full, s, truncate, keep_end)
    new = {}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            new[name] = value
            continue
        columns = window if name == "position_ids" else kept
        if name == "position_ids" and value.ndim == 3 and tuple(value.shape[1:]) == (rows, full):
            if not truncate:
                raise RefusedError
            new[name] = torch.stack([_take(section, [1], columns, False) for section in value])
            continue
        axes = _axes(name, value, rows, full)
        if axes:
            new[name] = _take(value, axes, columns, not truncate)
            if name == "position_ids" and not truncate and value.ndim == 2:
                new[name] = torch.tensor([_restarted(row) for row in new[name].tolist()], dtype=value.dtype)
        elif value.ndim and len(value) == rows:
            new[name] = torch.stack([item for item in value for _ in columns[0]])
        else:
            new[name] = value
    return new


def _columns(tensors, rows, full, s, truncate, keep_end):
    """Return the columns of each segment of each row, [B][K][s], with and without a preserved end."""
    mask = tensors.get("attention_mask")
    real = [[True] * full] * rows
    if is_tensor(mask, 2):
        if mask.shape[0] not in (1, rows) or mask.shape[1] != full:
            raise RefusedError
        real = [[value != 0 for value in row] for row in mask.tolist()]
        real = real * rows if len(real) == 1 else real
    segments = 1 if truncate else full // s
    kept, window = [], []
    for row in real:
        padding = row.index(True) if True in row else full
        start = min(padding, full - segments * s)
        window.append([list(range(start + k * s, start + k * s + s)) for k in range(segments)])
        kept.append([list(columns) for columns in window[-1]])
        if keep_end and True in row:
            last = full - 1 - row[::-1].index(True)
            kept[-1][0][-1] = max(kept[-1][0][-1], last)
    return kept, window


def _axes(name, value, rows, full):
    """Return the sequence axes of a tensor."""
    text, found = str(name), [axis for axis in range(1, value.ndim) if value.shape[axis] == full]
    is_mask = value.dtype == torch.bool or "mask" in text or "bias" in text
    if value.ndim == 3 and text.endswith("embeds"):
        found = [axis for axis in found if axis == 1]
    elif value.ndim == 3 and len(found) == 2 and not is_mask:
        raise RefusedError
    elif value.ndim == 4 and (is_mask or value.shape[1] == 1):
        found = [axis for axis in found if axis in (2, 3)]
    elif value.ndim >= 4 and found:
        raise RefusedError
    if found and value.shape[0] not in (1, rows):
        raise RefusedError
    if not found and value.ndim > 1 and name in PER_TOKEN:
        raise RefusedError
    return found


def _take(value, axes, columns, segmenting):
    """Return the elements of ``value`` in the columns [B][K][s] of each row."""
    if len(value) == 1 and not segmenting and all(row == columns[0] for row in columns):
        columns = columns[:1]
    if len(value) == 1 and segmenting and len(columns[0]) == 1 and all(row == columns[0] for row in columns):
        columns = columns[:1]
    out = []
    for row, segments in enumerate(columns):
        source = value[row if len(value) > 1 else 0]
        for segment in segments:
            shape = [len(segment) if axis + 1 in axes else size for axis, size in enumerate(source.shape)]
            new = torch.empty(shape, dtype=value.dtype)
            for place in itertools.product(*map(range, shape)):
                at = [segment[i] if axis + 1 in axes else i for axis, i in enumerate(place)]
                new[place] = source[tuple(at)]
            out.append(new)
    return torch.stack(out)


def _restarted(row):
    """Return the positions of a segment: those before the first that is smaller than the one before it start at 0."""
    new, first = [], row[0]
    for before, position in zip([row[0], *row], row, strict=False):
        first = 0 if position < before else first
        new.append(position - first)
    return new


# Documents side by side.


def _documents(tensors, main, truncate, padding_free):
    """Return the name of the position ids if the batch is padding-free."""
    shape = tensors[main].shape
    names = [name for name in ("position_ids", "positions") if is_tensor(tensors.get(name), len(shape))]
    names = [name for name in tensors if name in names and _whole(tensors[name])]
    positions = tensors[names[0]] if names else None
    markers = [name for name, value in tensors.items() if str(name).startswith("cu_seq") or name == "seq_idx"]
    markers = [name for name in markers if isinstance(tensors[name], torch.Tensor)]
    masks = [
        name
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor)
        and ("attention_mask" in str(name) or (value.ndim > 2 and tuple(value.shape[-2:]) == (shape[-1],) * 2))
    ]
    flat = len(shape) == 1
    if padding_free is None:
        restarts = truncate and positions is not None and not masks and _restarts(positions)
        padding_free = bool(markers) or flat or restarts
    elif not padding_free and (markers or flat):
        raise RefusedError
    if not padding_free:
        return None
    if not {*markers} <= {*CUMULATIVE, "seq_idx"}:
        raise RefusedError
    if (
        positions is None
        or not positions.numel()
        or masks
        or positions.shape[-1] != shape[-1]
        or (not flat and len(positions) not in (1, shape[0]))
    ):
        raise RefusedError
    return names[0]


def _restarts(positions):
    """Return whether every break in the counting is a return to the smallest position, and there is one."""
    rows = torch.atleast_2d(positions).tolist()
    if not positions.numel():
        return False
    smallest = min(min(row) for row in rows)
    breaks = [after for row in rows for before, after in itertools.pairwise(row) if after != before + 1]
    return bool(breaks) and set(breaks) == {smallest}


def _cut_documents(tensors, main, positions, s):
    shape, old = tensors[main].shape, tensors[positions]
    rows = torch.atleast_2d(old).tolist()
    smallest = min(min(row) for row in rows)
    new_rows, starts, pieces = [], [], []
    for row in rows:
        new_row, in_document = [], 0
        for column, position in enumerate(row):
            starts_here = column == 0 or position != row[column - 1] + 1
            in_document = 0 if starts_here else in_document + 1
            starts.append(starts_here)
            pieces.append(in_document % s == 0)
            new_row.append(in_document % s + smallest)
        new_rows.append(new_row)
    repeats = 1 if len(shape) == 1 else shape[0] // len(rows)
    starts, pieces = starts * repeats, pieces * repeats
    edges = [place for place, is_piece in enumerate(pieces) if is_piece] + [len(pieces)]
    new = dict(tensors)
    new[positions] = torch.tensor(new_rows if old.ndim == 2 else new_rows[0], dtype=old.dtype)
    for name, value in tensors.items():
        if name in CUMULATIVE and isinstance(value, torch.Tensor):
            given = value.long().tolist() if value.ndim == 1 else [1]
            inside = [place for place in given if place < len(starts)]
            if not given or given[0] != 0 or given[-1] != len(starts) or not all(starts[place] for place in inside):
                raise RefusedError
            new[name] = torch.tensor(edges, dtype=value.dtype)
        elif name == "seq_idx" and isinstance(value, torch.Tensor):
            if value.shape != shape:
                raise RefusedError
            flat = value.flatten().tolist()
            for place in range(1, len(flat)):
                if place % shape[-1] and flat[place] != flat[place - 1] and not starts[place]:
                    raise RefusedError
            numbers = [sum(pieces[place - place % shape[-1] : place + 1]) - 1 for place in range(len(pieces))]
            new[name] = torch.tensor(numbers, dtype=value.dtype).view(shape)
        elif name in ("max_length_q", "max_length_k") and isinstance(value, (torch.Tensor, int)):
            longest = max(after - before for before, after in itertools.pairwise(edges))
            new[name] = torch.tensor(longest, dtype=value.dtype) if isinstance(value, torch.Tensor) else longest
    return new
