"""faiss's own residual quantiser with its defaults, as a person without this project would call it."""

import faiss
import numpy as np


class FaissQuantiser:
    def __init__(self, width: int, levels: int, bits: int):
        self.quantiser = faiss.ResidualQuantizer(width, levels, bits)

    def tokenize(self, vectors: np.ndarray) -> tuple["FaissQuantiser", np.ndarray]:
        """Train on all vectors and encode all. Shapes: [N, D] -> [N, L] int32."""
        matrix = np.ascontiguousarray(vectors, dtype=np.float32)
        self.quantiser.train(matrix)
        packed = self.quantiser.compute_codes(matrix)
        bits = int(faiss.vector_to_array(self.quantiser.nbits)[0])
        levels = faiss.vector_to_array(self.quantiser.nbits).size
        unpacked = faiss.unpack_bitstrings(packed, levels, bits)
        return self, unpacked.astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Shapes: [n, L] -> [n, D]."""
        bits = int(faiss.vector_to_array(self.quantiser.nbits)[0])
        return self.quantiser.decode(faiss.pack_bitstrings(codes.astype(np.int64), bits))
