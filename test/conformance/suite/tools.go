// Package suite pins the upstream conformance suite, unmodified, and the programs in its images; build.sh builds them. The
// module is its own, as the suite needs much that Skein does not. The versions of what both need are Skein's, so that they share
// Go's build cache.
package suite

import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/test/e2e"
	_ "k8s.io/kubernetes/test/images/agnhost"
	_ "k8s.io/kubernetes/test/images/nonewprivs"
	_ "k8s.io/sample-apiserver"
)
