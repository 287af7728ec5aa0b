//go:build tools

// Package clients is a module of its own for what people bring along to a cluster: Helm, built as upstream releases it, and an operator
// (folder manager) on controller-runtime. Their dependencies are not Skein's. `make clients` and the test TestClients run them.
//
//	cd test/clients && go build -o ../../bin/helm helm.sh/helm/v4/cmd/helm
package clients

import _ "helm.sh/helm/v4/cmd/helm"
