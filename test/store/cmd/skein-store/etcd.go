package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"strconv"

	"skein.io/skein/consensus/host"
)

// etcdConfig is where and how etcd's API is served: plainly, or with mutual TLS if
// the files are named.
func (o options) etcdConfig(ps *peers) (c host.EtcdConfig, err error) {
	if o.etcd == "" || o.broken != "" {
		return c, nil
	}
	ip, port, err := splitPort(o.etcd)
	if err != nil {
		return c, err
	}
	c.Addresses, c.Port = []string{ip}, port
	c.Endpoint = func(id string) (string, int, bool) {
		x, ok := ps.find(func(x peer) bool { return x.id == id })
		addr, port, err := splitPort(x.etcd)
		return addr, port, ok && err == nil
	}
	if o.etcdCA == "" {
		return c, nil
	}
	pem, err := os.ReadFile(o.etcdCA)
	if err != nil {
		return c, err
	}
	cert, err := tls.LoadX509KeyPair(o.etcdCert, o.etcdKey)
	if err != nil {
		return c, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return c, fmt.Errorf("%s holds no certificate", o.etcdCA)
	}
	c.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
	return c, nil
}

func splitPort(addr string) (ip string, port int, err error) {
	ip, p, err := net.SplitHostPort(addr)
	if err == nil {
		port, err = strconv.Atoi(p)
	}
	if err != nil {
		return "", 0, fmt.Errorf("address %q: %w", addr, err)
	}
	return ip, port, nil
}
