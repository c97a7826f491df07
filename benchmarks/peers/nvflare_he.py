"""Rounds of NVFlare's homomorphic path, for the chapter "encryption", in its own environment.

    python nvflare_he.py '{"clients": 10, "values": 8192, "tensors": 1}' REPEAT

Its own classes do the work: the context as ``HEBuilder`` provisions it, ``HEModelEncryptor`` and
``HEModelDecryptor`` on the clients, FOBS for what travels, and the aggregation helper of
``HEInTimeAccumulateWeightedAggregator`` on the server. Prints samples in CPU time and bytes.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import numpy as np
import tenseal as ts
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_opt.he.model_decryptor import HEModelDecryptor
from nvflare.app_opt.he.model_encryptor import HEModelEncryptor
from nvflare.fuel.utils import fobs
from nvflare.lighter.impl.he import HEBuilder


def one_round(
    clients: int, values: int, tensors: int, contexts: tuple[bytes, bytes]
) -> dict[str, float]:
    """Encrypt, aggregate, decrypt; checks the sum."""
    rng = np.random.default_rng(0)
    parts = np.array_split(rng.normal(0, 0.05, values), tensors)
    secret = contexts[1]
    figures: dict[str, list[float]] = {}

    def timed(name: str, work: Any) -> Any:
        begin = time.process_time()
        result = work()
        figures.setdefault(name, []).append(time.process_time() - begin)
        return result

    helper, context = WeightedAggregationHelper(weigh_by_local_iter=False), FLContext()
    for k in range(clients):
        encryptor = HEModelEncryptor(weigh_by_local_iter=True)
        encryptor.tenseal_context, encryptor.encrypt_layers = ts.context_from(secret), [True]
        encryptor.n_iter = 1

        def upload(encryptor: HEModelEncryptor = encryptor) -> bytes:
            params = {f"t{i}": part.copy() for i, part in enumerate(parts)}
            encrypted, _ = encryptor.encryption(params, context)
            frame: bytes = fobs.dumps(DXO(DataKind.WEIGHT_DIFF, data=encrypted))
            return frame

        frame = timed("client_encrypt_s", upload)
        figures.setdefault("bytes_up", []).append(len(frame))
        name = f"c{k}"
        timed("server_s", lambda f=frame, c=name: helper.add(fobs.loads(f).data, 1.0, c, 0))
    begin = time.process_time()
    down = fobs.dumps(DXO(DataKind.WEIGHT_DIFF, data=helper.get_result()))
    server = sum(figures["server_s"]) + time.process_time() - begin
    decryptor = HEModelDecryptor()
    decryptor.tenseal_context = ts.context_from(secret)

    def opened() -> dict[str, Any]:
        data = fobs.loads(down).data
        # The received vectors carry a public context: attach the one with the key.
        data = {k: v.serialize() for k, v in data.items()}
        result: dict[str, Any] = decryptor.decryption(data, dict.fromkeys(data, True), context)
        return result

    result = timed("client_decrypt_s", opened)
    error = max(np.abs(np.array(result[f"t{i}"]) - p).max() for i, p in enumerate(parts))
    assert error < 1e-4, error
    return {
        "encrypt_ms": 1e3 * float(np.median(figures["client_encrypt_s"])),
        "decrypt_ms": 1e3 * figures["client_decrypt_s"][0],
        "server_ms": 1e3 * server,
        "bytes_up_per_value": float(np.median(figures["bytes_up"])) / values,
        "bytes_down_per_value": len(down) / values,
        "error": float(error),
    }


def main() -> None:
    logging.disable(logging.CRITICAL)
    case, repeat = json.loads(sys.argv[1]), min(3, int(sys.argv[2]))  # it takes minutes
    size = case["clients"], case["values"], case["tensors"]
    builder = HEBuilder()
    builder.initialize(None, None)
    contexts = builder.get_serialized_context(), builder.get_serialized_context(is_client=True)
    rows = [one_round(*size, contexts) for _ in range(repeat)]
    print(json.dumps({name: [row[name] for row in rows] for name in rows[0]}))


if __name__ == "__main__":
    main()
