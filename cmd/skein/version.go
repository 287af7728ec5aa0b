package main

import (
	"fmt"
	"runtime"

	"k8s.io/component-base/version"
)

type versionCmd struct{}

func (versionCmd) Run() error {
	v := version.Get()
	fmt.Printf("skein %s (%s/%s, %s)\n", v.GitVersion, runtime.GOOS, runtime.GOARCH, v.GoVersion)
	return nil
}
