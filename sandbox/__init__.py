"""A real single-node Kubernetes on one Linux machine, and a control plane alone for tests.

`python -m sandbox up` starts etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet,
kube-proxy, CoreDNS, containerd and BuildKit in namespaces of their own. `up --control-plane` starts etcd
and kube-apiserver only, without root.
"""
