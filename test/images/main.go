// Command images writes the archives of the project's own test images into a directory: see package bundle.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"

	"skein.io/skein/test/images/bundle"
)

func main() {
	out := flag.String("out", "out/images", "directory of the archives")
	box := flag.String("busybox", "auto", "path of a static busybox, auto or none")
	flag.Parse()
	p, err := bundle.Build(context.Background(), bundle.Config{Out: *out, Busybox: *box})
	if err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
	fmt.Printf("%s  %s\n%s  %s\n", p.Web, bundle.Web, p.Tools, bundle.Tools)
}
