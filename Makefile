# Skein. `make demo` shows a real cluster on this machine; `make test` runs every test. Both install what they need.
SHELL := /bin/bash
.DEFAULT_GOAL := build

KUBE := v1.36.3
VERSION ?= $(KUBE)+skein
V := k8s.io/component-base/version
LDFLAGS := -s -w -X $(V).gitVersion=$(VERSION) -X $(V).gitMajor=1 -X $(V).gitMinor=36 -X $(V).gitTreeState=clean
# grpcnotrace: without it golang.org/x/net/trace links html/template, which keeps every exported method in the binary.
TAGS := grpcnotrace
GO := CGO_ENABLED=0 go build -tags $(TAGS)

.PHONY: build demo demo-down test unit race e2e vet generate drift deps clean bench

build: ## the two executables, in bin/
	$(GO) -ldflags "$(LDFLAGS)" -o bin/skein ./cmd/skein
	$(GO) -ldflags "-s -w" -o bin/skein-helper ./cmd/skein-helper

deps: ## what the distribution must provide (runc, ip, nft)
	@test/deps.sh

bin/kubectl: go.mod ## upstream's kubectl, to try the cluster with
	$(GO) -ldflags "$(subst $(VERSION),$(KUBE),$(LDFLAGS))" -o $@ k8s.io/kubernetes/cmd/kubectl
