"""The field's four label vectors as labels of queries and gallery."""

from reidlab.retrieval.labels import Labels


def sides(q_pids, g_pids, q_camids, g_camids, tracks=None):
    "Labels of the queries, labels of the gallery."
    return Labels(q_pids, q_camids), Labels(g_pids, g_camids, tracks)
