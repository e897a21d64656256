"""Moving tokens into rows ordered by expert, and back.

Both directions are gathers, forward and backward: every row holds at most one (token, choice) pair and every pair has
at most one row, so the transpose of one gather is the other. XLA would transpose a gather into a scatter, which is
serial on CPU.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def rows_from_tokens(x: jax.Array, token_of_row: jax.Array, row_of_token: jax.Array) -> jax.Array:
    """Returns float[R, D]: row r is token token_of_row[r], or zeros where that is out of range.

    Args:
      x: float[M, D] tokens.
      token_of_row: int32[R]; M marks an empty row.
      row_of_token: int32[M, k] the inverse: rows of each token's k choices; R marks a choice without a row.
    """
    return _gather(x, token_of_row)


@jax.custom_vjp
def tokens_from_rows(rows: jax.Array, row_of_token: jax.Array, pair_of_row: jax.Array) -> jax.Array:
    """Returns float[M, k, D]: for each token the rows of its k choices, zeros for a choice without a row.

    Args:
      rows: float[R, D].
      row_of_token: int32[M, k]; R marks a choice without a row.
      pair_of_row: int32[R] the inverse: token * k + choice of each row; M * k marks an empty row.
    """
    return _gather(rows, row_of_token)


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _rows_fwd(x, token_of_row, row_of_token):
    return _gather(x, token_of_row), row_of_token


def _rows_bwd(row_of_token, cotangent):
    return _gather(cotangent, row_of_token).sum(axis=1), None, None


def _tokens_fwd(rows, row_of_token, pair_of_row):
    return _gather(rows, row_of_token), pair_of_row


def _tokens_bwd(pair_of_row, cotangent):
    flat = cotangent.reshape(-1, cotangent.shape[-1])
    return _gather(flat, pair_of_row), None, None


rows_from_tokens.defvjp(_rows_fwd, _rows_bwd)
tokens_from_rows.defvjp(_tokens_fwd, _tokens_bwd)


def invert(row_of_pair: jax.Array, num_rows: int) -> jax.Array:
    """Returns int32[R]: the pair in each row, len(row_of_pair) for an empty row.

    Args:
      row_of_pair: int32[P] distinct rows; num_rows marks a pair without a row.
      num_rows: R.
    """
    pairs = row_of_pair.shape[0]
    empty = jnp.full((num_rows,), pairs, jnp.int32)
    return empty.at[row_of_pair].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
