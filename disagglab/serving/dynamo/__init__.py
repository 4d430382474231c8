"""NVIDIA Dynamo: etcd, NATS, workers, frontends, and a deployment of them."""
