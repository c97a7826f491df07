"""One round of NVFlare's homomorphic path, for ``bench_homomorphic.py``, in its own environment.

    python nvflare_he.py CLIENTS VALUES TENSORS REPEAT

Its own classes do the work: the context as ``HEBuilder`` provisions it, ``HEModelEncryptor`` and
``HEModelDecryptor`` on the clients, FOBS for what travels, and the aggregation helper of
``HEInTimeAccumulateWeightedAggregator`` on the server. Prints one JSON object a repetition, in CPU
seconds and bytes.
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
        "client_encrypt_s": float(np.median(figures["client_encrypt_s"])),
        "client_decrypt_s": figures["client_decrypt_s"][0],
        "server_s": server,
        "bytes_up": float(np.median(figures["bytes_up"])),
        "bytes_down": float(len(down)),
        "error": float(error),
    }


def main() -> None:
    logging.disable(logging.CRITICAL)
    clients, values, tensors, repeat = map(int, sys.argv[1:])
    builder = HEBuilder()
    builder.initialize(None, None)
    contexts = builder.get_serialized_context(), builder.get_serialized_context(is_client=True)
    for _ in range(repeat):
        print(json.dumps(one_round(clients, values, tensors, contexts)), flush=True)


if __name__ == "__main__":
    main()
